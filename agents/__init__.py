"""The EnvironmentAgent actor and its prompt styles; installs as `flash.agents`."""
