"""The data: text in, token shards out, and where both are fetched."""
