#!/usr/bin/env bash
# An environment of its own for the comparison with sbi, in .venv-peers: torch and sbi, no Firedrake. sbi's requirements would
# otherwise change the packages that Firedrake runs on.
#
# Variables: PYTHON       interpreter to start from (default: python3)
#            TORCH_INDEX  package index for torch (PyTorch's CPU index saves a few GB against PyPI's build)
set -euo pipefail
cd "$(dirname "$0")/.."
py=.venv-peers/bin/python
torch=$(sed -n 's/^torch=\([0-9.]*\).*/\1/p' scripts/install.sh)
if "$py" -c 'import fem_diffusion, ot, sbi, sbibm, sklearn' >/dev/null 2>&1; then exit; fi
echo "setting up .venv-peers (2 min)"
[ -x "$py" ] || "${PYTHON:-python3}" -m venv .venv-peers
"$py" -m pip install --quiet "torch==$torch" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
"$py" -m pip install --quiet --editable ".[comparison,peers]"
# sbibm asks for an old sbi and for packages that its tasks do not use; only its tasks and reference samples are wanted.
"$py" -m pip install --quiet --no-deps "sbibm==1.1.0"
