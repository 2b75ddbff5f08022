# flake.nix, and the module with some configuration, evaluated without nixpkgs: what they use of it is
# written here, as small as can be. The result is one value without functions.
{ project, settings }:
let
  inherit (builtins)
    attrNames
    concatLists
    concatStringsSep
    elem
    filter
    genList
    hasAttr
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    mapAttrs
    match
    replaceStrings
    stringLength
    ;

  merge = left: right:
    if isAttrs left && isAttrs right && !(left ? type) then
      left // mapAttrs (name: value: if left ? ${name} then merge left.${name} value else value) right
    else if isList left && isList right then
      left ++ right
    else
      right;

  named = name: check: { inherit name check; };
  types = {
    bool = named "bool" isBool;
    str = named "str" isString;
    path = named "path" (value: isPath value || (isString value && match "/.*" value != null));
    package = named "package" (value: value.type or "" == "derivation");
    ints = {
      unsigned = named "unsigned" (value: isInt value && value >= 0);
      between = low: high: named "integer" (value: isInt value && value >= low && value <= high);
    };
    nullOr = type: named "null or ${type.name}" (value: value == null || type.check value);
    listOf = type: named "list of ${type.name}" (
      value: isList value && filter (item: !type.check item) value == [ ]
    );
    attrsOf = type: named "attributes of ${type.name}" isAttrs // { inherit type; };
    submodule = module: named "submodule" isAttrs // { inherit module; };
  };

  lib = rec {
    inherit types;
    inherit (builtins) concatStringsSep;
    licenses.asl20 = "Apache-2.0";
    platforms.linux = [ "x86_64-linux" ];
    cleanSource = path: path;
    genAttrs = names: work: listToAttrs (map (name: nameValuePair name (work name)) names);
    nameValuePair = name: value: { inherit name value; };
    mapAttrs' = work: set: listToAttrs (map (name: work name set.${name}) (attrNames set));
    filterAttrs = keep: set: listToAttrs (
      map (name: nameValuePair name set.${name}) (filter (name: keep name set.${name}) (attrNames set))
    );
    optional = condition: value: if condition then [ value ] else [ ];
    optionals = condition: values: if condition then values else [ ];
    optionalAttrs = condition: values: if condition then values else { };
    toList = value: if isList value then value else [ value ];
    imap0 = work: list: genList (index: work index (builtins.elemAt list index)) (length list);
    concatMapStrings = work: list: concatStringsSep "" (map work list);
    escapeShellArg = text: "'${replaceStrings [ "'" ] [ "'\\''" ] (toString text)}'";
    escapeShellArgs = words: concatStringsSep " " (map escapeShellArg words);
    getExe = package: "${package.outPath}/bin/${package.meta.mainProgram}";
    literalExpression = text: { inherit text; };
    mkOption = option: option // { isOption = true; };
    mkEnableOption = what: mkOption { type = types.bool; default = false; description = what; };
    mkDefault = value: value;
    mkIf = condition: content: if condition then content else { };
  };

  # The value of each option: what is set, else its default.
  valuesOf = path: options: set:
    let
      unknown = filter (name: !hasAttr name options) (attrNames set);
      valueOf = name: option:
        let
          where = "${path}.${name}";
          value = if hasAttr name set then set.${name} else option.default or (throw "${where} is not set");
        in
        if !(option ? isOption) then
          valuesOf where option (set.${name} or { })
        else if option.description or "" == "" then
          throw "${where} has no description"
        else if !option.type.check value then
          throw "${where} is no ${option.type.name}"
        else if option.type ? type then
          mapAttrs (key: item: valuesOf "${where}.${key}" (option.type.type.module { name = key; }).options item) value
        else
          value;
    in
    if unknown != [ ] then throw "${path}.${head unknown} is no option" else mapAttrs valueOf options;

  pythonPackage = name: { inherit name; type = "derivation"; };
  pkgs = {
    stdenv.hostPlatform.system = "x86_64-linux";
    callPackage = file: given:
      let work = import file; in
      work (builtins.intersectAttrs (builtins.functionArgs work) packages // given);
  };
  packages = {
    inherit lib;
    lmdb = pythonPackage "lmdb";
    python3.pkgs =
      listToAttrs (
        map (name: { inherit name; value = pythonPackage name; }) (
          import ./python_packages.nix
        )
      )
      // {
        buildPythonApplication = given: given // { outPath = "/package"; type = "derivation"; };
      };
  };

  flake = import (project + "/flake.nix");
  outputs = flake.outputs {
    self = outputs;
    nixpkgs = {
      inherit lib;
      legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (_system: pkgs);
    };
  };

  called = module: let loaded = if isPath module then import module else module; in
    if isFunction loaded then loaded { inherit lib pkgs; config = evaluated; } else loaded;
  collect = module: let loaded = called module; in
    [ loaded ] ++ concatLists (map collect (loaded.imports or [ ]));
  modules = collect outputs.nixosModules.default ++ [ { services.appliance = settings; } ];
  options = builtins.foldl' merge { } (map (module: module.options or { }) modules);
  configOf = module: module.config or (removeAttrs module [ "imports" "options" ]);
  # What sets options of the module does not depend on their values; the rest does.
  sets = filter (module: !(module ? config)) modules;
  evaluated.services.appliance = valuesOf "services.appliance" options.services.appliance
    (builtins.foldl' merge { } (map (module: (configOf module).services.appliance or { }) sets));
in
{
  inherit (builtins.foldl' merge { } (map configOf (filter (module: module ? config) modules)))
    environment
    systemd
    ;
  package = removeAttrs outputs.packages.x86_64-linux.default [ "src" "outPath" "type" ];
  outputs = attrNames outputs;
}
