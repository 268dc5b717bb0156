"""Benchmarks of kvpack beside torch, transformers and other runtimes: `python -m benchmarks --help`.

    __main__.py           the command line, and the list of parts
    kernels.py            (a) the Rust kernels alone: criterion's medians
    attention.py          (b) attention of one layer: the grid; layer_bench.py measures a cell of it
    model.py              (c) the whole model: decode, prefill, stalls; model_bench.py measures
    peers.py              (d) llama.cpp and OpenVINO on the same model; peer_llama.py, peer_openvino.py measure
    players.py            engines of (c) and (d) that decode by turns
    worker.py             measuring processes, one for each number of threads or peer, driven over a pipe
    measure.py            interleaved sampling and its spread
    results.py            the rows measured, on disk as JSON
    report.py, tables.py, targets.py, picture.py    README.md and the pictures, from the JSON alone

Nothing here needs torch on import except what measures it: the peers run in an environment of their own.
"""
