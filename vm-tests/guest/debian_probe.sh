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
python3 -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:9000/nix-cache-info")'
echo "http: $(systemctl is-active appliance-http)"
guest=$(pid appliance-virtiofs@web1); daemon=$(pid appliance-daemon)
dpkg -i /root/newer.deb > /root/dpkg.log; echo "upgrade: $?"
[ "$guest" = "$(pid appliance-virtiofs@web1)" ] && echo "guest's process: the same"
[ "$daemon" != "$(pid appliance-daemon)" ] && echo "daemon's process: another"
echo "content: $(appliance cat $path/file)"
journalctl -b -o cat -p warning -u 'appliance*' | sed 's/^/log: /'
dpkg -r appliance >> /root/dpkg.log; echo "removal: $?"
echo "afterwards: $(systemctl is-active appliance-virtiofs@web1 appliance-daemon appliance-daemon.socket | xargs)"
ls /usr/lib/appliance /usr/bin/appliance
echo "store: $(ls /var/lib/appliance | xargs)"
echo end
