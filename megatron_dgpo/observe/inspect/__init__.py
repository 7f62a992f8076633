"""The inspector: a local web page of the runs in a folder, those under way among them.

    python -m megatron_dgpo.observe.inspect RUNS_DIR [--host 127.0.0.1] [--port 8080]

It reads and never writes, and takes no lock of a run.
"""
