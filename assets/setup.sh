#!/bin/sh
# Sees to it that this machine can build lowkey and run its kernels: a Rust compiler, a linker, and a Vulkan driver that is not hopelessly slow.
#
# Quick where nothing is missing, and changes nothing then. On Debian and Ubuntu it installs what is missing; elsewhere it says what to install.
# A graphics card that already has its driver is left alone. Without one, Mesa's lavapipe runs the same kernels on the processor; Debian 12's own
# (Mesa 22.3) is about ten times slower at it than Mesa 25, which the release's backports suite has.
set -eu

rust_wanted=89 # minor version; Cargo.toml's rust-version
mesa_wanted=24 # the oldest major version whose lavapipe is fast enough

PATH=$PATH:/usr/sbin:/sbin
say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# --- what is there ---

# The name of every Vulkan driver installed, such as `lvp` or `radeon` or `nvidia`.
drivers() {
    for file in /etc/vulkan/icd.d/*.json /usr/share/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json; do
        [ -e "$file" ] && basename "$file" | sed 's/\.json$//; s/\.[a-z0-9_]*$//; s/_icd$//'
    done
    return 0
}

has_driver() { drivers | grep -Eqx "$1"; }

# Whether some graphics card here has a Vulkan driver of its own.
card_ready() {
    if [ -e /dev/nvidiactl ] && has_driver 'nvidia.*'; then return 0; fi
    for device in /sys/class/drm/renderD*/device/uevent; do
        [ -e "$device" ] || continue
        case $(sed -n 's/^DRIVER=//p' "$device") in
            amdgpu) has_driver 'radeon|amd' && return 0 ;;
            i915 | xe) has_driver 'intel' && return 0 ;;
            asahi) has_driver 'asahi' && return 0 ;;
            msm*) has_driver 'freedreno' && return 0 ;;
            panthor | panfrost) has_driver 'panfrost' && return 0 ;;
            v3d | vc4*) has_driver 'broadcom' && return 0 ;;
        esac
    done
    return 1
}

# Whether software rendering is all there is, by a Mesa that is slow at it, where a faster one can be had. What no package owns, somebody built: their choice.
slow() {
    [ "$ID" = debian ] && [ -z "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && ! card_ready || return 1
    major=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null | sed 's/^[0-9]*://; s/[^0-9].*//')
    [ -n "$major" ] && [ "$major" -lt "$mesa_wanted" ]
}

usable() {
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' || return 1
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] || card_ready || has_driver 'lvp'
}

# --- installing, on Debian and Ubuntu ---

as_root() {
    if [ "$(id -u)" = 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@"
    elif [ -t 0 ]; then
        sudo env DEBIAN_FRONTEND=noninteractive "$@"
    else
        sudo -n env DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

apt_get() {
    as_root apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 -o APT::Get::Assume-Yes=true "$@" >&2 ||
        die "\`apt-get $*\` did not work; see above. Where it lacked the rights, run it as root; or do without a driver: make demo DEVICE=cpu"
}

# The configured archive that the running release comes from, whichever format its sources are written in. Wants `apt-get update` first.
archive_of() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v release="$1" '$2 == release && $3 == "main" { print $1; exit }'
}

add_backports() {
    suite=$1-backports
    [ -z "$(archive_of "$suite")" ] || return 0
    archive=$(archive_of "$1")
    [ -n "$archive" ] || return 1
    list=/etc/apt/sources.list.d/lowkey-backports.list
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    option=
    [ ! -e "$keyring" ] || option="[signed-by=$keyring] "
    say "adding $suite to the package sources for a faster Mesa ($list; remove it to undo)"
    echo "deb $option$archive $suite main" | as_root tee "$list" >/dev/null
    # A mirror that lacks the suite must not be left broken.
    if ! as_root apt-get -qq update >&2 || [ -z "$(archive_of "$suite")" ]; then
        as_root rm -f "$list"
        as_root apt-get -qq update >&2
        return 1
    fi
}

install_vulkan() {
    say "installing Mesa's Vulkan drivers"
    apt_get update
    suite=
    if [ "$ID" = debian ]; then
        offered=$(apt-cache policy mesa-vulkan-drivers | sed -n 's/^ *Candidate: \([0-9]*:\)\{0,1\}\([0-9]*\)\..*/\2/p')
        if [ "${offered:-0}" -lt "$mesa_wanted" ] && add_backports "$VERSION_CODENAME"; then suite=$VERSION_CODENAME-backports; fi
    fi
    apt_get install --no-install-recommends ${suite:+-t "$suite"} libvulkan1 mesa-vulkan-drivers
}

# --- the check ---

command -v cargo >/dev/null || die "cargo is missing; install Rust 1.$rust_wanted or newer with rustup"
minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
[ "${minor:-999}" -ge "$rust_wanted" ] || die "cargo is 1.$minor, and 1.$rust_wanted is needed; update it with \`rustup update stable\`, or install rustup"

ID= ID_LIKE= VERSION_CODENAME=
[ ! -r /etc/os-release ] || . /etc/os-release
case " $ID $ID_LIKE " in
    *" debian "* | *" ubuntu "*) can_install=yes ;;
    *) can_install= ;;
esac

if ! command -v cc >/dev/null; then
    [ -n "$can_install" ] || die "a C compiler is missing (it links Rust programs); install gcc or clang"
    say "installing a C compiler, which links Rust programs"
    apt_get update
    apt_get install --no-install-recommends gcc libc6-dev
fi

if [ "$(uname -s)" = Darwin ] || [ "${1:-}" = build ]; then exit 0; fi # macOS brings Metal

if usable; then
    slow || exit 0
    (install_vulkan) || say "going on with the driver that is there; it is slow"
    exit 0
fi

if [ -z "$can_install" ]; then
    say "no usable Vulkan driver. Install the loader and your card's driver, or Mesa's software driver:"
    say "  Fedora: dnf install vulkan-loader mesa-vulkan-drivers"
    say "  Arch:   pacman -S vulkan-icd-loader vulkan-swrast"
    say "  Alpine: apk add vulkan-loader mesa-vulkan-swrast"
    say "or run on the processor: make demo DEVICE=cpu"
    exit 1
fi

if [ -e /dev/nvidiactl ]; then
    say "there is an NVIDIA card, but its Vulkan driver is not to be seen (in a container: NVIDIA_DRIVER_CAPABILITIES=all); going on with the software driver"
fi
install_vulkan
usable || die "Mesa's Vulkan drivers are installed, but none of them will do here; \`lowkey doctor\` says what was found"
say "done: Mesa $(dpkg-query -W -f '${Version}' mesa-vulkan-drivers)"
