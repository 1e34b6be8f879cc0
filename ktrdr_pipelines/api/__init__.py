"""The REST API of `ktrdr serve`: the specification's routes, thin over what the commands use. Imported only when it is served."""
