"""Networks and their shapes: arrays in, arrays out; nothing here samples, trains or reads files."""
