# The package, and the NixOS module of a host that serves virtual machines; see docs/nix.md.
{
  description = "A read-only virtiofs server over a content-addressed store";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      perSystem = lib.genAttrs systems;
    in
    {
      packages = perSystem (system: rec {
        appliance = nixpkgs.legacyPackages.${system}.callPackage ./nix/package.nix { };
        default = appliance;
      });

      overlays.default = final: _prev: {
        appliance = final.callPackage ./nix/package.nix { };
      };

      nixosModules.default =
        { lib, pkgs, ... }:
        {
          imports = [ ./nix/module.nix ];
          services.appliance.package =
            lib.mkDefault
              self.packages.${pkgs.stdenv.hostPlatform.system}.default;
        };
    };
}
