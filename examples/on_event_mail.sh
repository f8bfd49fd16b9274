#!/bin/sh
# Sends a mail when a study has finished, when its budget is spent, and when a trial has failed:
#
#   MAIL_TO=me@example.org study launch tpe --on-event examples/on_event_mail.sh
#
# It needs `sendmail`, which every mail server brings.
event=$(cat)
case "$event" in
*'"event": "study-finished"'* | *'"event": "budget-spent"'* | *'"event": "trial-failed"'*) ;;
*) exit 0 ;;
esac
{
    printf 'To: %s\n' "$MAIL_TO"
    printf 'Subject: study event\n'
    printf 'Content-Type: text/plain; charset=utf-8\n\n'
    printf '%s\n' "$event"
} | sendmail -t
