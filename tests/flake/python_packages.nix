# Names under which nixpkgs has Python packages, as far as they are needed.
[
  "aiohttp"
  "blake3"
  "cffi"
  "cryptography"
  "grpcio"
  "grpcio-health-checking"
  "grpcio-reflection"
  "grpcio-tools"
  "lmdb"
  "obstore"
  "prometheus-client"
  "protobuf"
  "setuptools"
  "uvloop"
  "zstandard"
]
