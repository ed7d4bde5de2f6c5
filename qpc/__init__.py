"""qpc: a compiler that makes language models smaller and faster with the least possible loss."""
