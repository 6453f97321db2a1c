"""Evaluate trained networks: python evaluate.py checkpoint=outputs/.../checkpoint.ckpt"""

from bqnn.commands import main

if __name__ == "__main__":
    main("evaluate")
