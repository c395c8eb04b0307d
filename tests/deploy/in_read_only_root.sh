#!/bin/sh
# in_read_only_root.sh ROOT COMMAND...: as a container runs it, as PID 1 of a namespace that `unshare --mount --net --pid
# --fork` made. As user 10001 without rights, on a root that is read-only but for /tmp and /data.
set -e
root=$1
shift
ip link set lo up
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o mode=700,uid=10001,gid=10001 tmpfs "$root/data"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
cd /
exec chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --bounding-set=-all --no-new-privs \
    env -i PATH=/opt/antefix/bin:/usr/bin:/bin HOME=/home/antefix PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    sh -c 'cd /data && exec "$@"' sh "$@"
