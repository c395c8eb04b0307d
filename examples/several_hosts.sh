#!/bin/sh
# Antefix over six hosts with TLS, on one machine: each "host" is a network namespace with a name and an address of its own.
#
#   examples/several_hosts.sh demo            # up, a conversation, links cut and healed, down
#   examples/several_hosts.sh up DIR          # certificates, keys, one settings file per role, all roles
#   examples/several_hosts.sh ask DIR TEXT    # one completion over HTTPS, as a client on a seventh host
#   examples/several_hosts.sh cut|heal DIR HOST      # HOST: store router prefill1 prefill2 decode1 decode2
#   examples/several_hosts.sh on HOST COMMAND...     # run a command there
#   examples/several_hosts.sh down DIR
#
# Needs root, iproute2 and redis-server. It makes namespaces called afx-*, and /etc/netns/afx-* with their host names.
set -eu

HOSTS="store router prefill1 prefill2 decode1 decode2"
ALL="$HOSTS client"
root=$(cd "$(dirname "$0")/.." && pwd)
model=${MODEL:-$root/models/antefix-tiny}

fail() { echo "several_hosts.sh: $*" >&2; exit 1; }
on() { host=$1; shift; ip netns exec "afx-$host" "$@"; }
name_of() { echo "$1.antefix.test"; }

number_of() {
    number=1
    for each in $ALL; do
        [ "$each" != "$1" ] || { echo "$number"; return; }
        number=$((number + 1))
    done
    fail "there is no host $1: use one of $ALL"
}

make_network() {
    ip netns add afx-switch 2>/dev/null || fail "network namespaces cannot be made here: are you root? Is an earlier run still up?"
    on switch ip link add br0 type bridge
    on switch ip link set br0 up
    hosts="127.0.0.1 localhost"
    for each in $ALL; do
        hosts="$hosts
10.77.0.$(number_of "$each") $(name_of "$each")"
    done
    for each in $ALL; do
        ip netns add "afx-$each"
        mkdir -p "/etc/netns/afx-$each"
        echo "$hosts" >"/etc/netns/afx-$each/hosts"
        on switch ip link add "to-$each" type veth peer name eth0 netns "afx-$each"
        on switch ip link set "to-$each" master br0 up
        on "$each" ip address add "10.77.0.$(number_of "$each")/24" dev eth0
        on "$each" ip link set eth0 up
        on "$each" ip link set lo up
    done
}

make_secrets() {
    umask 077
    mkdir -p "$dir/etc" "$dir/log" "$dir/run"
    antefix certs init "$dir/ca" >/dev/null
    for each in $HOSTS; do
        role=$(echo "$each" | tr -d 0-9 | sed 's/^store$/kvstore/')
        antefix certs issue "$role" "$each" --ca "$dir/ca" --out "$dir/credentials/$each" --host "$(name_of "$each")" >/dev/null
    done
    antefix certs issue operator me --ca "$dir/ca" --out "$dir/credentials/operator" >/dev/null
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$dir/secret"
    head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$dir/redis.password"
    antefix keys create acme --file "$dir/api-keys.json" --output "$dir/api.key" >/dev/null
}

make_settings() {
    redis="rediss://antefix@$(name_of store):6379/0"
    worker="
model = \"$model\"
secret_file = \"$dir/secret\"
store_address = \"$(name_of store):7001\"
routers = [\"$(name_of router):7000\"]
pool_bytes = \"64M\"
threads = 1
window_pool = \"$redis\"
events_redis = \"$redis\"
redis_password_file = \"$dir/redis.password\"
redis_ca_file = \"$dir/credentials/store/ca.crt\"
address = \"0.0.0.0:7002\""
    for each in prefill1 prefill2 decode1 decode2; do
        printf '[%s]%s\nadvertise = "%s"\ncredentials = "%s"\n' "$(echo "$each" | tr -d 0-9)" "$worker" "$(name_of "$each")" \
            "$dir/credentials/$each" >"$dir/etc/$each.toml"
    done
    cat >"$dir/etc/store.toml" <<SETTINGS
[kvstore]
dir = "$dir/store"
address = "0.0.0.0:7001"
credentials = "$dir/credentials/store"
secret_file = "$dir/secret"
budget_bytes = "512M"
SETTINGS
    cat >"$dir/etc/router.toml" <<SETTINGS
[router]
model = "$model"
secret_file = "$dir/secret"
store_address = "$(name_of store):7001"
address = "0.0.0.0:7000"
http_address = "0.0.0.0:8000"
credentials = "$dir/credentials/router"
api_keys_file = "$dir/api-keys.json"
ledger_dir = "$dir/ledger"
leases = true
events_redis = "$redis"
redis_password_file = "$dir/redis.password"
redis_ca_file = "$dir/credentials/store/ca.crt"
SETTINGS
    cat >"$dir/etc/redis.conf" <<SETTINGS
port 0
tls-port 6379
bind 0.0.0.0
tls-cert-file $dir/credentials/store/tls.crt
tls-key-file $dir/credentials/store/tls.key
tls-ca-cert-file $dir/credentials/store/ca.crt
tls-auth-clients no
user default off
user antefix on >$(cat "$dir/redis.password") ~* &* +@all
save ""
SETTINGS
}

start_role() {
    host=$1 role=$2
    ip netns exec "afx-$host" antefix serve "$role" --config "$dir/etc/$host.toml" >"$dir/run/$host.json" 2>"$dir/log/$host.log" &
    echo $! >"$dir/run/$host.pid"
}

wait_for_role() {
    tries=0
    until [ -s "$dir/run/$1.json" ]; do
        kill -0 "$(cat "$dir/run/$1.pid")" 2>/dev/null || { tail -n 5 "$dir/log/$1.log" >&2; fail "$1 ended while it started"; }
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || fail "$1 did not start within 300 s; see $dir/log/$1.log"
        sleep 1
    done
    echo "$1 serves: $(cat "$dir/run/$1.json")"
}

up() {
    command -v redis-server >/dev/null || fail "redis-server is not installed (Debian: apt install redis-server)"
    mkdir -p "$dir"
    make_network
    make_secrets
    make_settings
    ip netns exec afx-store redis-server "$dir/etc/redis.conf" >"$dir/log/redis.log" 2>&1 &
    echo $! >"$dir/run/redis.pid"
    start_role store kvstore
    wait_for_role store
    start_role router router
    wait_for_role router
    for each in prefill1 prefill2 decode1 decode2; do start_role "$each" "$(echo "$each" | tr -d 0-9)"; done
    for each in prefill1 prefill2 decode1 decode2; do wait_for_role "$each"; done
}

ask() {
    on client curl --silent --show-error --max-time 120 --cacert "$dir/credentials/router/ca.crt" \
        --header "authorization: Bearer $(cat "$dir/api.key")" --header 'content-type: application/json' \
        --data "{\"model\": \"m\", \"prompt\": \"$1\", \"max_tokens\": 8, \"temperature\": 0}" \
        "https://$(name_of router):8000/v1/completions"
    echo
}

down() {
    for file in "$dir"/run/*.pid; do
        [ -e "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
    for file in "$dir"/run/*.pid; do
        tries=0
        while [ -e "$file" ] && kill -0 "$(cat "$file")" 2>/dev/null && [ "$tries" -lt 30 ]; do
            tries=$((tries + 1))
            sleep 1
        done
        [ -e "$file" ] && kill -9 "$(cat "$file")" 2>/dev/null || true
        rm -f "$file"
    done
    for each in $ALL switch; do
        ip netns delete "afx-$each" 2>/dev/null || true
        rm -rf "/etc/netns/afx-$each"
    done
}

demo() {
    dir=$(mktemp -d)
    trap 'down; rm -rf "$dir"' EXIT
    up
    text=$(printf 'The quick brown fox jumps over the lazy dog. %.0s' $(seq 30))
    echo "1. The first time nothing is stored:" && ask "$text"
    echo "2. Again: usage.prompt_tokens_details.cached_tokens are hits:" && ask "$text"
    echo "3. decode1 loses its link; the other one answers:" && cut decode1 && ask "$text And so on." && heal decode1
    echo "4. The store loses its link; answers stay the same, without its hits:" && cut store && ask "$text" && heal store
    echo "5. Healed:" && ask "$text"
}

cut() { on switch ip link set "to-$1" down; }
heal() { on switch ip link set "to-$1" up; }

command=${1:-help}
case $command in
    up | down) dir=${2:?a directory}; "$command" ;;
    ask) dir=${2:?a directory}; ask "${3:?a prompt}" ;;
    cut | heal) number_of "${3:?a host}" >/dev/null; "$command" "$3" ;;
    on) shift; on "$@" ;;
    demo) demo ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" ;;
esac
