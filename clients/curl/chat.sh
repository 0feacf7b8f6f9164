#!/bin/sh
# A onebase server by curl: models, a reply, a stream.   ONEBASE_URL=http://127.0.0.1:8000/v1 ./chat.sh [model]
set -eu
url=${ONEBASE_URL:-http://127.0.0.1:8000/v1}
key=${ONEBASE_API_KEY:-none}

call() { curl --silent --show-error --fail-with-body --header "Authorization: Bearer $key" "$@"; }

echo "== models"
call "$url/models"
model=${1:-$(call "$url/models" | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')}

echo; echo "== a reply of $model"
call "$url/chat/completions" --header 'Content-Type: application/json' --data @- <<JSON
{"model": "$model", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64, "temperature": 0}
JSON

echo; echo "== the same as a stream"
call --no-buffer "$url/chat/completions" --header 'Content-Type: application/json' --data @- <<JSON
{"model": "$model", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64, "temperature": 0,
 "stream": true, "stream_options": {"include_usage": true}}
JSON
