# The package. What it depends on is read from pyproject.toml, so that it is written down once.
{
  lib,
  python3,
  lmdb,
}:
let
  project = (builtins.fromTOML (builtins.readFile ../pyproject.toml)).project;
  # "grpcio>=1.68" is grpcio; nixpkgs says which version.
  nameOf = requirement: builtins.head (builtins.match "([A-Za-z0-9_-]+).*" requirement);
  requirements = map nameOf project.dependencies;
in
python3.pkgs.buildPythonApplication {
  pname = project.name;
  version = project.version;
  pyproject = true;
  src = lib.cleanSource ../.;

  build-system = [
    python3.pkgs.setuptools
    python3.pkgs.cffi
  ];
  # Messages are generated anew, because generated code needs a protobuf at least as new as itself.
  nativeBuildInputs = [ python3.pkgs.grpcio-tools ];
  buildInputs = [ lmdb ];
  dependencies = map (name: python3.pkgs.${name}) requirements;
  pythonRelaxDeps = requirements;

  preBuild = ''
    python -m grpc_tools.protoc --proto_path=. --python_out=. appliance/protos/*.proto
  '';

  postInstall = ''
    for unit in systemd/*; do
      install -D --mode=444 "$unit" "$out/lib/systemd/system/$(basename "$unit")"
    done
    substituteInPlace "$out"/lib/systemd/system/*.service --replace-fail /usr/bin/ "$out/bin/"
    mkdir -p "$out/sbin"
    ln -s ../bin/mount.appliance ../bin/mount.fuse.appliance "$out/sbin/"
  '';

  # The tests boot virtual machines, mount file systems and need root.
  doCheck = false;
  pythonImportsCheck = [
    "appliance.cli.main"
    "appliance._engine"
  ];

  meta = {
    inherit (project) description;
    license = lib.licenses.asl20;
    mainProgram = "appliance";
    platforms = lib.platforms.linux;
  };
}
