# services.appliance: a store on a NixOS host, and what it serves to virtual machines and other hosts.
#
# The units and their restrictions are those of the package (systemd/ in its source); here they get
# their options as drop-ins.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;

  cfg = config.services.appliance;
  appliance = lib.getExe cfg.package;
  store = "--store=lmdb://${cfg.storeDir}";

  # A list with an empty item first takes the place of what the package's unit says.
  instead = values: [ "" ] ++ lib.toList values;
  command = words: lib.escapeShellArgs ([ appliance ] ++ words);

  # Secret keys are credentials of the service: only it reads them.
  keysOf = paths: lib.imap0 (index: path: { inherit path; name = "key${toString index}"; }) paths;
  signing = {
    credentials = paths: map (key: "${key.name}:${key.path}") (keysOf paths);
    # %d is the directory of the credentials, and must not be quoted away.
    options = paths: lib.concatMapStrings (key: " --sign=%d/${key.name}") (keysOf paths);
  };

  vmOptions =
    { name, ... }:
    {
      options = {
        closure = mkOption {
          type = types.listOf types.path;
          default = [ ];
          example = lib.literalExpression "[ config.microvm.vms.web.config.config.system.build.toplevel ]";
          description = ''
            Store paths that are copied into the store, with their closures, before the machine is
            served. The guest sees these closures and nothing else, with a file `.registration` for
            its `nix-store --load-db`. Without any, it sees the whole store.
          '';
        };
        socket = mkOption {
          type = types.path;
          default = "/run/appliance-${name}/virtiofs.sock";
          description = ''
            The socket to which the virtual machine monitor connects. Its directory must exist,
            unless it is /run/appliance-${name}.
          '';
        };
        group = mkOption {
          type = types.str;
          default = "kvm";
          description = "The group whose members may connect to the socket.";
        };
        queues = mkOption {
          type = types.ints.between 1 64;
          default = 1;
          description = "The number of request queues, each of which is served by a process.";
        };
        listRoot = mkOption {
          type = types.bool;
          default = false;
          description = ''
            Whether a guest that sees the whole store may list it, rather than only use paths that it
            knows. A closure can always be listed.
          '';
        };
      };
    };
in
{
  options.services.appliance = {
    enable = lib.mkEnableOption "the content-addressed store, and its daemon";

    package = mkOption {
      type = types.package;
      description = "The package to use.";
    };

    storeDir = mkOption {
      type = types.path;
      default = "/var/lib/appliance/store";
      description = "The directory of the store. The units make only the default one by themselves.";
    };

    daemon = {
      listen = mkOption {
        type = types.listOf types.str;
        default = [ "/run/appliance/store.sock" ];
        example = [
          "/run/appliance/store.sock"
          "[::1]:8000"
        ];
        description = ''
          Where the daemon serves the store over gRPC, as in ListenStream= of systemd.socket(5).
          Everybody who can connect may read everything and, unless `readOnly` is set, put new
          store paths.
        '';
      };
      readOnly = mkOption {
        type = types.bool;
        default = false;
        description = "Whether to refuse everything that clients put.";
      };
      trustedPublicKeys = mkOption {
        type = types.nullOr (types.listOf types.str);
        default = null;
        description = ''
          Keys one of which must have signed each store path that is put and that has no content
          address; null if no signatures are required.
        '';
      };
      signKeyPaths = mkOption {
        type = types.listOf types.path;
        default = [ ];
        description = "Files with secret keys that sign each store path that is put.";
      };
    };

    http = {
      enable = lib.mkEnableOption "the binary cache for Nix over HTTP";
      listen = mkOption {
        type = types.listOf types.str;
        default = [ "127.0.0.1:9000" ];
        description = "Where it is served, as in ListenStream= of systemd.socket(5).";
      };
      signKeyPaths = mkOption {
        type = types.listOf types.path;
        default = [ ];
        description = "Files with secret keys that sign each narinfo.";
      };
      priority = mkOption {
        type = types.ints.unsigned;
        default = 39;
        description = "Of several caches, Nix asks the one with the lowest number first.";
      };
    };

    gc = {
      enable = lib.mkEnableOption "daily garbage collection of the store";
      deleteOlderThan = mkOption {
        type = types.str;
        default = "30d";
        description = ''
          Store paths that were put within this time stay, even if no root, view or machine uses
          them.
        '';
      };
    };

    vms = mkOption {
      type = types.attrsOf (types.submodule vmOptions);
      default = { };
      description = "The virtual machines that are served, by their names.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    environment.variables.APPLIANCE_STORE = "lmdb://${cfg.storeDir}";
    systemd.packages = [ cfg.package ];

    systemd.sockets =
      {
        appliance-daemon = {
          wantedBy = [ "sockets.target" ];
          listenStreams = instead cfg.daemon.listen;
        };
      }
      // lib.optionalAttrs cfg.http.enable {
        appliance-http = {
          wantedBy = [ "sockets.target" ];
          listenStreams = instead cfg.http.listen;
        };
      };

    systemd.timers = lib.optionalAttrs cfg.gc.enable {
      appliance-gc.wantedBy = [ "timers.target" ];
    };

    systemd.services =
      {
        appliance-daemon.serviceConfig = {
          ReadWritePaths = [ "-${cfg.storeDir}" ];
          LoadCredential = signing.credentials cfg.daemon.signKeyPaths;
          ExecStart = instead (
            command (
              [
                "daemon"
                store
                "--listen-address=sd-listen:store"
              ]
              ++ lib.optional cfg.daemon.readOnly "--read-only"
              ++ lib.optionals (cfg.daemon.trustedPublicKeys != null) [
                "--require-signatures"
                "--trusted-public-keys=${lib.concatStringsSep " " cfg.daemon.trustedPublicKeys}"
              ]
            )
            + signing.options cfg.daemon.signKeyPaths
          );
        };
      }
      // lib.optionalAttrs cfg.http.enable {
        appliance-http.serviceConfig = {
          ReadWritePaths = [ "-${cfg.storeDir}" ];
          LoadCredential = signing.credentials cfg.http.signKeyPaths;
          ExecStart = instead (
            command [
              "http"
              store
              "--listen-address=sd-listen:http"
              "--priority=${toString cfg.http.priority}"
            ]
            + signing.options cfg.http.signKeyPaths
          );
        };
      }
      // lib.optionalAttrs cfg.gc.enable {
        appliance-gc.serviceConfig = {
          ReadWritePaths = [ "-${cfg.storeDir}" ];
          ExecStart = instead (command [
            "gc"
            store
            "--delete-older-than=${cfg.gc.deleteOlderThan}"
          ]);
        };
      }
      // lib.mapAttrs' (
        name: vm:
        lib.nameValuePair "appliance-virtiofs@${name}" {
          overrideStrategy = "asDropin";
          wantedBy = [ "multi-user.target" ];
          requires = lib.optional (vm.closure != [ ]) "appliance-closure-${name}.service";
          after = lib.optional (vm.closure != [ ]) "appliance-closure-${name}.service";
          serviceConfig = {
            Group = vm.group;
            ReadWritePaths = [
              "-${cfg.storeDir}"
              "-${cfg.storeDir}.state"
            ];
            ExecStart = instead (
              command (
                [
                  "virtiofs"
                  store
                  "--socket-path=${vm.socket}"
                  "--num-request-queues=${toString vm.queues}"
                  "--keep-sessions"
                ]
                ++ lib.optional (vm.closure != [ ]) "--view=${name}"
                ++ lib.optional vm.listRoot "--list-root"
              )
            );
          };
        }
      ) cfg.vms
      // lib.mapAttrs' (
        name: vm:
        lib.nameValuePair "appliance-closure-${name}" {
          description = "Closure of ${name} in the content-addressed store";
          before = [ "appliance-virtiofs@${name}.service" ];
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
            StateDirectory = "appliance";
            ExecStart = [
              (command (
                [
                  "copy"
                  store
                  "--recursive"
                ]
                ++ map toString vm.closure
              ))
              (command (
                [
                  "view"
                  "set"
                  store
                  name
                  "--registration-files"
                  "--closure"
                ]
                ++ map toString vm.closure
              ))
            ];
          };
        }
      ) (lib.filterAttrs (_name: vm: vm.closure != [ ]) cfg.vms);
  };
}
