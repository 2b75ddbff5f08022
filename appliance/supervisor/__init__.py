"""The supervisor process: sockets, vhost-user sessions, the workers' lives, the resolver."""
