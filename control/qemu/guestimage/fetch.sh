#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts what the tests' guests boot into the folder given: Debian's cloud kernel,
# its virtio modules, busybox. They are taken out of their packages and not
# installed, so that the host gets no kernel. Does nothing, quickly, when they
# are there.
set -euo pipefail
dir=$1
[[ ! -e $dir/ready ]] || exit 0

rm -rf "$dir"
mkdir -p "$dir"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
chmod 755 "$tmp" # apt may download as another user
cd "$tmp"

download() {
	# The metapackage names the kernel of the day.
	local kernel
	kernel=$(apt-cache depends --important linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
	[[ $kernel ]] && apt-get -q -o Acquire::Retries=5 -o APT::Sandbox::User=root download "$kernel" busybox-static
}
if ! download; then
	[[ $EUID != 0 ]] || apt-get -q -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 update
	download || { echo "the guest's kernel (linux-image-cloud-amd64) and busybox-static cannot be downloaded from Debian" >&2; exit 1; }
fi
for deb in *.deb; do
	dpkg-deb -x "$deb" out
done

cd - >/dev/null
cp "$tmp"/out/boot/vmlinuz-* "$dir/vmlinuz"
cp "$tmp"/out/bin/busybox "$dir/busybox"
for m in virtio virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net virtio_blk; do
	find "$tmp/out" -name "$m.ko" -exec cp {} "$dir/" \;
	[[ -e $dir/$m.ko ]] || { echo "the guest's kernel has no module $m" >&2; exit 1; }
done
chmod 644 "$dir/vmlinuz"
touch "$dir/ready"
