"""The trainer: a handle in the controller, FSDP2 ranks in processes of their own.

Arrays and tensors carry the letters of their axes (`logprobs_T`): the table is in CONTRIBUTING.md.
"""
