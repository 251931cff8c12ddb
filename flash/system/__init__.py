"""The machine below: processes and what ends them, sockets, files, what there is of them."""
