"""Train a network: python train.py method=bbb task=digits"""

from bqnn.commands import main

if __name__ == "__main__":
    main("train")
