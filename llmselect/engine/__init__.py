"""The model passes: rows in, named arrays out. Importing this package loads no torch; its modules do."""
