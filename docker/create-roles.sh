#!/bin/sh
# Roles of a new database; the image of PostgreSQL runs this once, when it has made the database $POSTGRES_DB.
#
#   study_owner   makes the tables and migrates them: the service `init`
#   study_worker  reads and writes rows: the workers
#   study_reader  reads rows: the dashboard and `report`
set -eu
secrets=/run/secrets
for name in owner worker reader; do
    if [ "$(head -n 1 "$secrets/$name" | tr -d '\r\n' | wc -c)" -lt 12 ]; then
        echo "the password in secrets/$name has fewer than 12 characters; make one with: openssl rand -hex 24" >&2
        exit 1
    fi
done

psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<SQL
\set owner \`head -n 1 $secrets/owner\`
\set worker \`head -n 1 $secrets/worker\`
\set reader \`head -n 1 $secrets/reader\`
BEGIN;
CREATE ROLE study_owner LOGIN PASSWORD :'owner';
CREATE ROLE study_worker LOGIN PASSWORD :'worker';
CREATE ROLE study_reader LOGIN PASSWORD :'reader';
ALTER ROLE study_reader SET default_transaction_read_only = on;

ALTER DATABASE "$POSTGRES_DB" OWNER TO study_owner;
REVOKE ALL ON DATABASE "$POSTGRES_DB" FROM PUBLIC;
GRANT CONNECT ON DATABASE "$POSTGRES_DB" TO study_worker, study_reader;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO study_worker, study_reader;

-- For all tables that study_owner will make.
ALTER DEFAULT PRIVILEGES FOR ROLE study_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO study_worker;
ALTER DEFAULT PRIVILEGES FOR ROLE study_owner IN SCHEMA public
    GRANT USAGE, SELECT ON SEQUENCES TO study_worker;
ALTER DEFAULT PRIVILEGES FOR ROLE study_owner IN SCHEMA public
    GRANT SELECT ON TABLES TO study_reader;
COMMIT;
SQL
