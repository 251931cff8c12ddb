"""Environments: one `gymnasium.Env` with text spaces a file; installs as `flash.envs`."""
