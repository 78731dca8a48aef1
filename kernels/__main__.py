"""python -m kernels [--check]: embed the sources of this folder in model_new.py, or say whether the copy is fresh."""

import sys

from kernels import MODEL_NEW, embedded


def main() -> int:
    old = MODEL_NEW.read_text()
    new = embedded(old)
    if "--check" in sys.argv[1:]:
        if old != new:
            print("model_new.py: the embedded kernels are stale; run: python -m kernels", file=sys.stderr)
        return int(old != new)
    if old != new:
        MODEL_NEW.write_text(new)
        print("model_new.py: embedded kernels updated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
