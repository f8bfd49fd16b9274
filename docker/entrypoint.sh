#!/bin/sh
# Entry point of the image: study ARGUMENTS, with the database password that is in the file $DATABASE_PASSWORD_FILE.
# libpq reads a password file only if nobody else can, and a secret that Compose mounts has the host's owner and mode.
# So it is copied into one, on the container's tmpfs; the environment then has no password.
set -eu
if [ -n "${DATABASE_PASSWORD_FILE:-}" ]; then
    umask 077
    password=$(sed -e 's/[\\:]/\\&/g' -e 1q "$DATABASE_PASSWORD_FILE")
    PGPASSFILE=$(mktemp)
    printf '*:*:*:*:%s\n' "$password" > "$PGPASSFILE"
    export PGPASSFILE
fi
exec study "$@"
