# Sourced by the scripts here, from the repository's root: the environment that `make install` made, where the one that
# is active has no Megatron-Core.
if [ -x .venv/bin/python ] \
    && ! python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("megatron.core") is None)' > /dev/null 2>&1; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
