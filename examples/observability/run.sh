#!/bin/sh
# Antefix, Prometheus where it is installed, and a trace as load; README.md says more. Ends what it started.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
data=${DATA_DIR:-$(mktemp -d)}
door=${HTTP_ADDRESS:-127.0.0.1:8000}
prometheus_at=${PROMETHEUS_ADDRESS:-127.0.0.1:9090}
started=

stop() {
    # shellcheck disable=SC2086 # a list of process ids
    [ -z "$started" ] || kill $started 2>/dev/null || true
    wait
    [ -n "${DATA_DIR:-}" ] || rm -rf "$data"
}
trap stop EXIT
trap 'exit 130' INT TERM

antefix up --data-dir "$data/antefix" --http-address "$door" &
started="$started $!"
tries=0
until curl --silent --fail --output /dev/null "http://$door/healthz"; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || { echo "run.sh: Antefix did not start within 300 s" >&2; exit 1; }
    sleep 1
done

if command -v prometheus >/dev/null; then
    sed -e "s|/var/lib/antefix/metrics-targets.json|$data/antefix/metrics-targets.json|" -e "s|alerts.yml|$root/deploy/alerts.yml|" \
        "$root/deploy/prometheus.yml" >"$data/prometheus.yml"
    prometheus --config.file="$data/prometheus.yml" --storage.tsdb.path="$data/prometheus" \
        --web.listen-address="$prometheus_at" --log.level=warn &
    started="$started $!"
    echo "Prometheus: http://$prometheus_at"
else
    echo "Prometheus is not installed: the page and antefix top show the deployment without it."
fi

echo "Page: http://$door/ui    Terminal: antefix top --url http://$door"
antefix load --url "http://$door/v1" --generate agents --scale "${SCALE:-0.03}" --speed "${SPEED:-30}" \
    --requests "${REQUESTS:-100}" --max-output-tokens 16
[ -z "${KEEP:-}" ] || { echo "Ctrl-C ends it."; wait; }
