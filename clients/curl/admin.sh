#!/bin/sh
# Versions by curl: what there is, roll back, serve the newest again.   ./admin.sh ADAPTER
set -eu
root=${ONEBASE_URL:-http://127.0.0.1:8000/v1}
root=${root%/v1}/admin
key=${ONEBASE_API_KEY:-none}
adapter=${1:?name an adapter}

call() { curl --silent --show-error --fail-with-body --header "Authorization: Bearer $key" "$@"; echo; }

call "$root/adapters/$adapter"
call --request POST "$root/adapters/$adapter/rollback"
call "$root/adapters/$adapter/publish" --header 'Content-Type: application/json' --data '{"version": 2}'
# Train its next version from a file below the home folder's datasets/:
#   call "$root/retrain" --header 'Content-Type: application/json' \
#        --data "{\"adapter\": \"$adapter\", \"dataset\": \"more.jsonl\", \"preset\": \"default\"}"
