"""In the place of SGLang: a server with its routes, over an embedded worker."""
