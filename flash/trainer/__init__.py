"""The trainer: a handle in the controller, FSDP2 ranks in processes of their own."""
