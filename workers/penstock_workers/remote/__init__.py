"""Models at other servers: what is sent there, when it may be sent, and what comes back."""
