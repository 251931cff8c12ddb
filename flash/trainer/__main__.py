"""`python -m flash.trainer`: a trainer rank as a process of its own."""

from flash.process import die_with_parent, lasting

if __name__ == "__main__":
    die_with_parent()  # before the import of torch, which takes seconds
    with lasting():
        from flash.trainer.rank import main

    main()
