"""`python -m flash.trainer`: a trainer rank as a process of its own."""

import os

from flash.system.process import lasting

if __name__ == "__main__":
    # In pages of 2 MiB, where the kernel has them, what layers are gathered in takes a third less
    # of a CPU's time; torch looks once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with lasting():
        from flash.trainer.rank import main

    main()
