"""Speed on an NVIDIA GPU: packed products, those of other libraries, and whole models, all in one run.

    python benchmarks/speed_gpu.py [--only kernels,peers,models] [--output speed_gpu.json] [--plot speed_gpu.png]

Products are medians of replayed CUDA graphs that cycle through more weights than the cache holds, peers' likewise.
Copy bandwidth is that of a kernel of torch on 1 GiB, read and written. "copy" is what moving a matrix's bytes at it
would take, "small copy" what a copy of as many bytes takes, its launch included. Models have random weights, made on
the GPU. Peers are measured where they are installed: benchmarks/peers/README.md.
"""

from gpu.command import main

if __name__ == "__main__":
    main(__doc__)
