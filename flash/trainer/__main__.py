"""`python -m flash.trainer`: a trainer rank as a process of its own."""

from flash.system.process import lasting

if __name__ == "__main__":
    with lasting():
        from flash.trainer.rank import main

    main()
