"""zerotop: launches, watches and steers ZeRO training runs from a terminal."""
