"""Run a command where there is no network but the loopback: a namespace of its own, in which nothing else can be reached.

    unshare --user --map-root-user --net python tests/no_network.py COMMAND..."""
import fcntl, os, socket, struct, sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:   # kernels of notebooks speak over 127.0.0.1
    UP, RUNNING = 0x1, 0x40
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", UP | RUNNING))          # SIOCSIFFLAGS
try: socket.create_connection(("192.0.2.1", 80), timeout=1).close()              # an address that documents use
except OSError: pass
else: sys.exit("there is a network here")
os.execvp(sys.argv[1], sys.argv[1:])
