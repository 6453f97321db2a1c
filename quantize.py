"""Quantize trained networks: python quantize.py checkpoint=outputs/.../checkpoint.ckpt"""

from bqnn.commands import main

if __name__ == "__main__":
    main("quantize")
