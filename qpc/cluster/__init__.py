"""Work spread over the machines of a Ray cluster: Ray places tasks, repeats them and moves data; what is here keeps the bytes alike."""
