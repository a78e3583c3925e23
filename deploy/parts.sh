#!/bin/sh
# Downloads the programs that are not on PATH from Debian's or Ubuntu's archive, and unpacks them into FOLDER/bin. Nothing
# is installed, and root is not needed. Usage: deploy/parts.sh FOLDER demo|test
set -eu

folder=$(mkdir -p "$1" && cd "$1" && pwd)
case "${2:-demo}" in
demo) programs="prometheus promtool prometheus-alertmanager amtool prometheus-blackbox-exporter sshd ssh-keygen busybox"
    packages="prometheus prometheus-alertmanager prometheus-blackbox-exporter openssh-server openssh-client
        busybox-static libnss-wrapper" ;;
test) programs="prometheus promtool prometheus-alertmanager amtool prometheus-blackbox-exporter sshd ssh ssh-agent ssh-add ssh-keygen busybox
        dockerd docker containerd containerd-shim-runc-v2 runc docker-init tini nginx redis-server zsh chromium"
    packages="prometheus prometheus-alertmanager prometheus-blackbox-exporter openssh-server openssh-client
        busybox-static libnss-wrapper docker.io containerd runc tini nginx redis-server zsh
        chromium fonts-dejavu-core fonts-wqy-microhei" ;;
*) echo "usage: $0 FOLDER demo|test" >&2; exit 2 ;;
esac
umask 022
mkdir -p "$folder/bin" "$folder/root" "$folder/debs" "$folder/lists/partial" "$folder/cache/archives/partial"
PATH=$folder/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=
for program in $programs; do
    command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
# The library that gives an unprivileged sshd its own account is not on PATH.
wrapper=$(ls "$folder"/root/usr/lib/*/libnss_wrapper.so /usr/lib/*/libnss_wrapper.so 2>/dev/null | head -n 1)
[ -n "$wrapper" ] || missing="$missing libnss_wrapper.so"
if [ "${2:-demo}" = test ]; then
    packages="$packages systemd libsystemd-shared sudo docker-compose debootstrap"
    command -v debootstrap >/dev/null 2>&1 || missing="$missing debootstrap"
    [ -x /usr/bin/sudo ] || [ -x "$folder/root/usr/bin/sudo" ] || missing="$missing sudo"
    command -v docker-compose >/dev/null 2>&1 || missing="$missing docker-compose"
    [ -x /lib/systemd/systemd ] || [ -x "$folder/root/lib/systemd/systemd" ] || missing="$missing systemd"
fi
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
    echo "Not found on PATH:$missing" >&2
    echo "This system has no apt to download them. Install Prometheus, Alertmanager, blackbox_exporter and OpenSSH's" >&2
    echo "server (for the tests also docker and nginx) with its own package manager." >&2
    exit 1
fi
echo "These programs are not on PATH:$missing" >&2
echo "Downloading them from the package archive of this system; they are unpacked into $folder, not installed." >&2

apt() {
    apt-get -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o Acquire::Languages=none \
        -o Acquire::Retries=3 -o APT::Sandbox::User=root "$@"
}
echo "Reading the package lists …" >&2
apt -qq update >&2
# Dependencies that this system lacks are downloaded too; those that it has are used.
needed=$(apt -s install --no-install-recommends $packages 2>/dev/null |
    awk '$1 == "Inst" && $3 !~ /^\[/ && $2 !~ /^(libjs-|fonts-|iptables|libip6tc|libnftnl|libnfnetlink|libnetfilter)/ {print $2}') || needed=
cd "$folder/debs"
rm -f ./*.deb
downloads=$(printf '%s\n' $needed $packages libwrap0 | sort -u)
apt -qq --print-uris download $downloads |
    awk '{bytes += $3} END {printf "Downloading %d packages, %.0f MB …\n", NR, bytes / 1e6}' >&2
apt -q download $downloads >&2
echo "Unpacking …" >&2
for package in ./*.deb; do
    dpkg-deb -x "$package" "$folder/root"
done
rm -f ./*.deb

libraries=$(find "$folder/root" -type d \( -path '*/lib/*-linux-gnu' -o -path '*/lib/*-linux-gnu/pulseaudio' \) | sort | tr '\n' ':')
link() { # name, path below root
    real=$folder/root/$2
    [ -x "$real" ] || return 0
    if ldd "$real" 2>/dev/null | grep -q 'not found'; then
        printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$real" >"$folder/bin/$1"
        chmod 755 "$folder/bin/$1"
    else
        ln -sfn "$real" "$folder/bin/$1"
    fi
}
for name in $programs; do
    for place in usr/bin usr/sbin bin sbin; do
        [ -x "$folder/root/$place/$name" ] && link "$name" "$place/$name"
    done
done
# A script that was only unpacked does not find the Python modules of its package.
if [ -x "$folder/root/usr/bin/docker-compose" ]; then
    printf '#!/bin/sh\nPYTHONPATH=%s exec /usr/bin/python3 %s "$@"\n' "$folder/root/usr/lib/python3/dist-packages" \
        "$folder/root/usr/bin/docker-compose" >"$folder/bin/docker-compose"
    chmod 755 "$folder/bin/docker-compose"
fi
# A script that needs the path of its own files.
if [ -x "$folder/root/usr/sbin/debootstrap" ]; then
    printf '#!/bin/sh\nDEBOOTSTRAP_DIR=%s exec sh %s "$@"\n' "$folder/root/usr/share/debootstrap" \
        "$folder/root/usr/sbin/debootstrap" >"$folder/bin/debootstrap"
    chmod 755 "$folder/bin/debootstrap"
fi
# Debian's start script refers to installed paths; the browser finds fonts by fontconfig.
if [ -x "$folder/root/usr/lib/chromium/chromium" ]; then
    printf '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig><dir>%s</dir><dir>/usr/share/fonts</dir><cachedir>%s</cachedir></fontconfig>\n' \
        "$folder/root/usr/share/fonts" "$folder/cache/fonts" >"$folder/fonts.conf"
    rm -f "$folder/bin/chromium"
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s FONTCONFIG_FILE=%s exec %s "$@"\n' "$libraries" "$folder/fonts.conf" \
        "$folder/root/usr/lib/chromium/chromium" >"$folder/bin/chromium"
    chmod 755 "$folder/bin/chromium"
fi
# Docker mounts this file into containers as their init: it must be a program, not a script.
[ -x "$folder/root/usr/bin/tini-static" ] && ln -sfn "$folder/root/usr/bin/tini-static" "$folder/bin/docker-init"
# The path of the default template is compiled into Debian's Alertmanager: replace it with a relative one of equal length.
alertmanager=$folder/root/usr/bin/prometheus-alertmanager
if [ -x "$alertmanager" ] && [ ! -e /usr/share/prometheus/alertmanager/default.tmpl ]; then
    LC_ALL=C sed 's#/usr/share/prometheus/alertmanager#usr/share/prometheus//alertmanager#g' "$alertmanager" >"$alertmanager.moved"
    chmod 755 "$alertmanager.moved"
    rm -f "$folder/bin/prometheus-alertmanager"
    printf '#!/bin/sh\ncd %s && exec %s "$@"\n' "$folder/root" "$alertmanager.moved" >"$folder/bin/prometheus-alertmanager"
    chmod 755 "$folder/bin/prometheus-alertmanager"
fi

for program in $programs; do
    command -v "$program" >/dev/null 2>&1 || { echo "Not in the downloaded packages: $program" >&2; exit 1; }
done
