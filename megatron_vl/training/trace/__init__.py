"""What a rank of any layout takes, read from its own step on a device without memory."""
