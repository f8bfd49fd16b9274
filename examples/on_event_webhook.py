#!/usr/bin/env python3
"""Sends a study's events to a chat or a phone: Slack, Mattermost, ntfy, or any other webhook.

WEBHOOK_URL=https://… study launch tpe --on-event "python3 examples/on_event_webhook.py"

Slack and Mattermost take {"text": …}. For ntfy set WEBHOOK_FORMAT=text: it takes the bare text.
"""

import json
import os
import sys
import urllib.request

event = json.load(sys.stdin)
text = f"{event['study']}: {event['event']}"
if "trial" in event:
    text += f", trial {event['trial']}"
if event.get("value") is not None:
    text += f", accuracy {event['value']:.4f}"
if event.get("best") is not None:
    text += f", best {event['best']:.4f} (trial {event['best_trial']})"
if event.get("error"):
    text += f": {event['error']}"
if os.environ.get("WEBHOOK_FORMAT") == "text":
    body, kind = text, "text/plain; charset=utf-8"
else:
    body, kind = json.dumps({"text": text}), "application/json"
request = urllib.request.Request(os.environ["WEBHOOK_URL"], body.encode(), {"Content-Type": kind})
urllib.request.urlopen(request, timeout=8).close()
