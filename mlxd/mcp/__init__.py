"""Tools of MCP servers (Model Context Protocol): which servers there are, their connections, their tools.

It does not know HTTP's side of mlxd, chats or models. The protocol itself is the official `mcp` package's,
an extra (`pip install "mlxd[mcp]"`) that is imported only where servers are configured.
"""
