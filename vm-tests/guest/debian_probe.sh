#!/bin/bash
# Runs as a service in the Debian of ../debian_system.py, which looks for the lines that this prints.
exec >/root/result 2>&1
export LC_ALL=C.UTF-8
pid() { systemctl show -p MainPID --value "$1"; }
echo "before: $(systemctl is-active appliance-daemon.socket appliance-daemon | xargs)"
systemctl start appliance-daemon.socket appliance-http.socket
# A connection starts the service; `start` then waits until it says that it is ready.
python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("/run/appliance/store.sock")'
echo "on connection: $(systemctl show -p ActiveState --value appliance-daemon)"
systemctl start appliance-daemon
mkdir /root/tree; echo hello > /root/tree/file
export APPLIANCE_STORE=grpc+unix:/run/appliance/store.sock
path=$(appliance import /root/tree)
echo "content: $(appliance cat $path/file)"
echo "daemon: $(systemctl is-active appliance-daemon)"
echo "socket: $(stat -c '%U:%G %a' /run/appliance/store.sock)"
systemctl start appliance-virtiofs@web1
started=$?
state=$(systemctl show -p Type,ActiveState,SubState --value appliance-virtiofs@web1 | xargs)
echo "virtiofs: $started $state"
echo "listens: $(stat -c %F /run/appliance-web1/virtiofs.sock)"
# A guest reads while systemd restarts its supervisor, kills and restarts it, stops and starts it, and finds it hanging; and while
# its workers are killed.
session() { appliance status --json --store lmdb:///var/lib/appliance/store | python3 -c \
  'import json, sys; print(*[s["pid"] for s in json.load(sys.stdin)["sessions"] if s["socket"] == sys.argv[1]])' "$1"; }
workers() { appliance status --json --store lmdb:///var/lib/appliance/store | python3 -c \
  'import json, sys; print(*[w["pid"] for s in json.load(sys.stdin)["sessions"] if s["socket"] == sys.argv[1] for w in s["workers"]])' "$1"; }
lines() { # UNIT TEXT: the priorities of the lines of the journal that contain the text
  journalctl -b -o json -u "$1" | python3 -c 'import json, sys
lines = map(json.loads, sys.stdin)
print(*sorted({line["PRIORITY"] for line in lines if sys.argv[1] in str(line["MESSAGE"])}))' "$2"; }
add() { mkdir /root/new; echo hello > /root/new/file; basename "$(appliance import --name "$1" /root/new)"; rm -r /root/new; }
reads_on() { # NAME UNIT SOCKET
  coproc guest { PYTHONPATH=/usr/lib/appliance:/root/checkout \
    python3 /root/checkout/reading_guest.py "$3" "$(basename "$path")" 2>&1; }
  local guest_pid=$guest_PID first main act line
  read -r line <&"${guest[0]}"; echo "$1: guest: $line"
  first=$(session "$3")
  for act in restart kill stop hang worker; do
    main=$(pid "$2")
    case $act in
      restart) systemctl restart "$2" ;;
      kill) systemctl kill --signal=KILL --kill-whom=main "$2" ;;
      stop) systemctl stop "$2"; systemctl start "$2" ;;
      hang) # which the watchdog notices
        exec 8< <(exec timeout 300 journalctl -f -n 0 -o cat -u "$2"); follower=$!
        kill -STOP "$main"; grep -m 1 '^Started' <&8 >/dev/null; kill "$follower"; exec 8<&- ;;
      worker) kill -KILL $(workers "$3") ;;
    esac
    echo "$1: $act: $?"
    add "$1-$act" >&"${guest[1]}"
    read -r line <&"${guest[0]}"; echo "$1: after $act: $line"
    [ "$main" != "$(pid "$2")" ] && echo "$1: after $act: another supervisor"
    [ -n "$first" ] && [ "$first" = "$(session "$3")" ] && echo "$1: after $act: the same session process"
  done
  echo "$1: watchdog: $(journalctl -b -o cat -u "$2" | grep -c 'Watchdog timeout')"
  systemctl kill --kill-whom=main -s USR1 "$2"
  echo "$1: $(systemctl status "$2" | grep -o 'Status: .*')"
  echo end >&"${guest[1]}"
  read -r line <&"${guest[0]}"; echo "$1: guest: $line"
  wait "$guest_pid"
  echo "$1: priorities: $(lines "$2" 'are locked down') $(lines "$2" 'starting another')"
  echo "$1: state: $(journalctl -b -o cat -u "$2" | grep -c 'state of /run/')"
  echo "$1: sandboxes: $(journalctl -b -o cat -u "$2" | grep -c 'are locked down: .*a filter of system calls')"
  journalctl -b -o cat -u "$2" | sed -n "s/.*are locked down/$1: locked down/p" | sort -u
}
reads_on vm appliance-virtiofs@web1 /run/appliance-web1/virtiofs.sock
systemctl enable --quiet appliance-virtiofs-metrics.socket
systemctl start appliance-virtiofs
reads_on host appliance-virtiofs "$(appliance attach --state-dir /var/lib/appliance/store.state web2)"
metrics() { python3 -c 'import sys, urllib.request as u; print(u.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics").read().decode())' "$1"; }
echo "virtiofs metrics: $(metrics 9464 | grep -c '^appliance_store_entries{')"
systemctl stop appliance-virtiofs
echo "its socket: $(systemctl is-active appliance-virtiofs-metrics.socket)"
systemctl enable --quiet appliance-daemon-metrics.socket; systemctl restart appliance-daemon
appliance cat $path/file >/dev/null
echo "daemon metrics: $(metrics 9465 | grep -c '^appliance_grpc_calls_total{')"
echo "daemon $(systemctl status appliance-daemon | grep -o 'Status: .*')"
python3 -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:9000/nix-cache-info")'
echo "http: $(systemctl is-active appliance-http)"
# Word for word, except for the VM itself; the group is that of Debian's packages of QEMU.
groupadd --force kvm
env -u APPLIANCE_STORE bash /root/tutorial >/root/tutorial.log 2>&1; status=$?
echo "tutorial: $status"
[ $status = 0 ] || sed 's/^/tutorial: /' /root/tutorial.log
systemctl stop appliance-virtiofs
guest=$(pid appliance-virtiofs@web1); daemon=$(pid appliance-daemon)
dpkg -i /root/newer.deb > /root/dpkg.log; echo "upgrade: $?"
[ "$guest" = "$(pid appliance-virtiofs@web1)" ] && echo "guest's process: the same"
[ "$daemon" != "$(pid appliance-daemon)" ] && echo "daemon's process: another"
echo "content: $(appliance cat $path/file)"
# systemd remarks on sessions that outlive their supervisor, and on what was killed here.
journalctl -b -o cat -p warning -u 'appliance*' | grep -v -e 'Found left-over process' -e 'indicates unclean termination' \
  -e 'code=killed, status=9/KILL' -e "Failed with result 'signal'" -e 'Watchdog timeout' -e "Failed with result 'watchdog'" \
  -e 'status=6/ABRT' -e 'signal SIGABRT' -e 'was killed by signal 9; starting another' | sed 's/^/log: /'
dpkg -r appliance >> /root/dpkg.log; echo "removal: $?"
echo "afterwards: $(systemctl is-active appliance-virtiofs@web1 appliance-daemon appliance-daemon.socket | xargs)"
ls /usr/lib/appliance /usr/bin/appliance
echo "store: $(ls /var/lib/appliance | xargs)"
echo end
