"""Write the demo prior as a stock SD 1.5 checkpoint: `python dev/make_checkpoint.py OUT.safetensors`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from prior.export import write_stock_checkpoint

if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".safetensors"):
        sys.exit(__doc__)
    write_stock_checkpoint(sys.argv[1])
    print(f"written: {sys.argv[1]}")
