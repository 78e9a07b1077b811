#!/usr/bin/env bash
# Brings up everything fem_diffusion runs on: Debian packages, then a virtual environment in .venv with PETSc, Firedrake and torch.
# Run it as often as you like: what is there already is kept, an interrupted step is done again, the first failure stops it.
#
#   scripts/install.sh            install what is missing
#   scripts/install.sh --which    print the Python interpreter that has (or will have) Firedrake
#
# Variables: PYTHON       interpreter to start from; if it has Firedrake already, it is used as it is and no .venv is made
#            TORCH_INDEX  package index for torch (PyTorch's CPU index saves a few GB against PyPI's build)
# pip's own variables and configuration (PIP_FIND_LINKS, cache, index) hold as always.
set -euo pipefail
cd "$(dirname "$0")/.."

petsc=3.26.0        # Firedrake asks for petsc4py of exactly this version
mpi4py=4.1.2
h5py=3.16.0
firedrake=2026.10.0
torch=2.13.0
extras=test,comparison,vtk,report,units,monitor

system_packages=(build-essential gfortran flex bison pkg-config cmake ninja-build patchelf
    openmpi-bin libopenmpi-dev libopenblas-dev libhdf5-mpi-dev libhwloc-dev libmetis-dev libscotch-dev libptscotch-dev
    libmumps-dev libscalapack-openmpi-dev libsuitesparse-dev)
# To build the compiled packages. pip: older ones ignore their own cache under --no-binary; setuptools: as this set was tried.
tools=("pip>=24" "setuptools>=77.0.3,<81" wheel numpy "cython>=3,<4" pkgconfig pybind11 "petsctools>=2026.1"
    "libsupermesh>=2026.3" "firedrake-rtree>=2026.3" "rtree>=1.2")

stop() { printf '%s\n' "$@" >&2; exit 1; }
took() { echo "$(($1 / 60)) min $(($1 % 60)) s"; }
pip() { "$py" -m pip "$@"; }
quietly() { "$@" >/dev/null 2>&1; }

# ---- What counts as installed: asked of the environment itself, no stamps, so that one made by hand is recognised too ----

# have REQUIREMENT...: pip writes INSTALLER after everything else, so a copy that was cut short does not count.
have() {
    "$py" -P - "$@" <<'EOF'
import sys
from importlib.metadata import distribution
from pip._vendor.packaging.requirements import Requirement

for wanted in map(Requirement, sys.argv[1:]):
    found = distribution(wanted.name)
    assert found.read_text("INSTALLER") and wanted.specifier.contains(found.version), wanted
EOF
}
has_tools() { have "${tools[@]}"; }

# The same version may be there without MPI, or linked to libraries of another machine: so load each compiled package.
has_petsc() {
    have "petsc==$petsc" && "$py" -P -c 'import ctypes, glob, petsc
ctypes.CDLL(glob.glob(petsc.get_petsc_dir() + "/lib/libpetsc.so.*")[0])
found = open(petsc.get_petsc_dir() + "/include/petscconf.h").read()
for package in ["HDF5", "MUMPS", "PTSCOTCH", "SUITESPARSE"]:
    assert f"PETSC_HAVE_{package} " in found, package'
}
has_mpi4py() { have "mpi4py==$mpi4py" && "$py" -P -c 'from mpi4py import MPI; assert "Open MPI" in MPI.Get_library_version()'; }
has_petsc4py() { have "petsc4py==$petsc" && "$py" -P -c 'from petsc4py import PETSc'; }
has_h5py() { have "h5py==$h5py" && "$py" -P -c 'import h5py; assert h5py.get_config().mpi'; }
has_firedrake() { have "firedrake==$firedrake" && "$py" -P -c 'import firedrake'; }
has_torch() { have "torch==$torch"; }
has_package() {     # this checkout, editable, with the requirements as setup.cfg has them now
    "$py" -P - <<'EOF'
import json
from importlib.metadata import distribution
from pathlib import Path

found = distribution("fem_diffusion")
source = json.loads(found.read_text("direct_url.json"))
assert source["url"] == Path.cwd().as_uri() and source["dir_info"].get("editable")
assert next(f for f in found.files if f.name == "INSTALLER").locate().stat().st_mtime > Path("setup.cfg").stat().st_mtime
EOF
}
has_everything() {  # in one go, for a quick start
    have "${tools[@]}" "petsc==$petsc" "petsc4py==$petsc" "mpi4py==$mpi4py" "h5py==$h5py" "torch==$torch" && has_package &&
        has_firedrake && has_h5py
}
has_venv() { "$py" -m pip --version; }
has_system() {      # leaves what is missing in $missing
    local package wanted=("${system_packages[@]}")
    # Debian's own Python comes without venv and headers.
    package=$("$base" -c 'import sys; print("python%d.%d" % sys.version_info[:2] if sys.base_prefix == "/usr" else "")')
    [ -z "$package" ] || wanted+=("$package-venv" "$package-dev")
    missing=()
    for package in "${wanted[@]}"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ]
}

# ---- How to install each ----

get_system() {
    local admin=()
    [ "$(id -u)" -eq 0 ] || admin=(sudo -n)
    "${admin[@]}" apt-get update && "${admin[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"
}

# compiled NAME VERSION CHECK: a wheel from the user's own wheelhouse if one fits this machine, otherwise from source
# (the index may offer wheels without MPI); a wheel that pip's cache kept from other settings is built again.
compiled() {
    local again="--force-reinstall --no-deps --no-build-isolation $1==$2"
    pip install --no-index $again && $3 && return
    pip install --no-binary "$1" $again || return 1
    $3 || pip install --no-cache-dir --no-binary "$1" $again
}
get_venv() { "$base" -m venv .venv; }
get_tools() { pip install "${tools[@]}"; }
get_petsc() {
    local hdf5 library ptscotch=
    hdf5=/usr/lib/$(gcc -print-multiarch)/hdf5/openmpi
    for library in ptesmumps ptscotch ptscotcherr esmumps scotch scotcherr; do      # not every release has all of them
        [ "$(gcc -print-file-name=lib$library.so)" = lib$library.so ] || ptscotch+=,-l$library
    done
    # No hypre: Debian 12's is too old for this PETSc. The last two keep make from throttling itself on a busy machine.
    export PETSC_CONFIGURE_OPTIONS="--with-debugging=0 --with-fortran-bindings=0 --with-shared-libraries=1
        --with-hdf5-include=/usr/include/hdf5/openmpi --with-hdf5-lib=[$hdf5/libhdf5.so,$hdf5/libhdf5_hl.so]
        --with-hwloc --with-metis --with-ptscotch-include=/usr/include/scotch --with-ptscotch-lib=[${ptscotch#,}]
        --with-scalapack-lib=-lscalapack-openmpi --with-mumps --with-suitesparse
        --COPTFLAGS=-O3 --CXXOPTFLAGS=-O3 --FOPTFLAGS=-O3
        --with-make-np=$(($(nproc) + 1)) --with-make-load=$((4 * $(nproc)))"
    compiled petsc "$petsc" has_petsc
}
# These two only pass calls on; the usual -O3 doubles the time to compile them for nothing.
get_mpi4py() { CFLAGS="-O1 -g0" compiled mpi4py "$mpi4py" has_mpi4py; }
get_petsc4py() { CFLAGS="-O1 -g0" compiled petsc4py "$petsc" has_petsc4py; }
get_h5py() {
    CC=mpicc HDF5_MPI=ON HDF5_INCLUDEDIR=/usr/include/hdf5/openmpi HDF5_LIBDIR=/usr/lib/$(gcc -print-multiarch)/hdf5/openmpi \
        compiled h5py "$h5py" has_h5py
}
get_firedrake() {   # always built in place: its wheel holds paths of the environment which built it; then its requirements
    pip install --no-cache-dir --no-binary firedrake --force-reinstall --no-deps --no-build-isolation "firedrake==$firedrake" &&
        pip install "firedrake==$firedrake"
}
get_torch() { pip install "torch==$torch" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}; }
get_package() { pip install "$@" --editable ".[$extras]"; }

# step TITLE EXPECTED NAME: get_NAME unless has_NAME
number=0
step() {
    local log=.venv/logs/$3.log start=$SECONDS
    number=$((number + 1))
    if quietly "has_$3"; then echo "[$number/10] $1: there already"; return; fi
    echo "[$number/10] $1: takes about $2 (log: $log)"
    if ! { "get_$3" && "has_$3"; } >"$log" 2>&1 </dev/null; then
        tail -n 25 "$log" >&2
        stop "" "'$1' failed after $(took $((SECONDS - start))). The last lines of $log are above." \
            "The same command resumes with this step."
    fi
    echo "      done in $(took $((SECONDS - start)))"
}

# ---- Which interpreter ----

candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
base=
for candidate in $candidates; do
    if quietly "$candidate" -c 'import sys; assert sys.version_info >= (3, 11)'; then base=$candidate; break; fi
done
[ "$base" ] || stop "No Python of version 3.11 or later here (tried: $candidates). Install one, or name it: make ... PYTHON=/path/to/python3"

py=.venv/bin/python
if quietly "$base" -P -c "import sys
from importlib.metadata import version
from pathlib import Path
release = lambda text: [int(part) for part in text.split('.')[:2]]
assert Path(sys.prefix).resolve() != Path('.venv').resolve()
assert release(version('firedrake')) >= release('$firedrake')"; then py=$base; fi
if [ "${1:-}" = --which ]; then echo "$py"; exit; fi
if [ "$py" = "$base" ]; then
    quietly has_package && exit
    echo "$("$py" -c 'import sys; print(sys.prefix)') has Firedrake and is used as it is; fem_diffusion (editable) and what it lacks are added."
    get_package --quiet
    exit
fi

# ---- The work ----

mkdir -p .venv/logs
exec 9>.venv/lock
unset PETSC_DIR PETSC_ARCH      # they would lead petsc4py to another PETSc
flock 9     # two of these at once would install over each other
if quietly has_everything; then exit; fi

echo "fem_diffusion: setting up .venv (3 min if pip finds wheels of the compiled packages, 20 to 40 min from source on two cores)"
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
quietly command -v dpkg-query || stop "This machine has no Debian packages. Install Firedrake $firedrake by its own instructions," \
    "activate its environment and give the same command again: the rest goes into that environment."
if ! has_system && [ "$(id -u)" -ne 0 ] && ! quietly sudo -n true; then
    stop "Debian packages are missing, and this account may not install them. An administrator has to run" \
        "" "    apt-get update && apt-get install -y ${missing[*]}" "" "then give the same command again."
fi
step "System packages" "2 min" system
step "Virtual environment" "10 s" venv
step "Build tools" "1 min" tools
step "PETSc $petsc" "5 to 10 min from source, 10 s from a wheel" petsc
step "mpi4py $mpi4py" "2 to 4 min from source, 5 s from a wheel" mpi4py
step "petsc4py $petsc" "3 to 10 min from source, 5 s from a wheel" petsc4py
step "h5py $h5py with MPI" "2 to 4 min from source, 5 s from a wheel" h5py
step "Firedrake $firedrake" "2 min" firedrake
if ! [ "${TORCH_INDEX:-}" ] && ! quietly has_torch; then
    echo "       torch comes from where pip finds it; PyPI's build is several GB, the one on PyTorch's CPU index a tenth of it:"
    echo "       make ... TORCH_INDEX=<address of PyTorch's CPU index>"
fi
step "torch $torch" "1 min, more on a slow line" torch
step "fem_diffusion and what else it needs" "1 min" package
echo "Environment ready after $(took $SECONDS)."
