/* Counts what a process changes in files below one folder, and at a chosen operation kills it or lets the disk be full.

   LD_PRELOAD this; FAULT_ROOT names the folder. `fault_arm(at, mode)` then begins to count: the operation with number
   `at` (from 1) is not made: with mode 1 the process gets SIGKILL, with mode 2 it, and from then on each that needs
   room, fails with ENOSPC. `fault_count()` is the number of operations so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long counted;
static long at;
static int mode;

void fault_arm(long number, int how) { counted = 0; at = number; mode = how; }
long fault_count(void) { return counted; }

static int below(const char *path) {
    const char *root = getenv("FAULT_ROOT");
    size_t n = root ? strlen(root) : 0;
    return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static int below_at(int dir, const char *path) {
    char link[64], base[PATH_MAX], whole[2 * PATH_MAX];
    if (path[0] == '/') return below(path);
    if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) return 0;
        base[n] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return below(whole);
}

static int below_fd(int fd) {
    char link[64], base[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
    return below(base);
}

/* 1 if the operation must fail for want of room. */
static int faulty(int is_below, int needs_room) {
    if (!mode || !is_below) return 0;
    long number = ++counted;
    if (number < at) return 0;
    if (mode == 1) { kill(getpid(), SIGKILL); for (;;) pause(); }
    if (mode == 2 && needs_room) { errno = ENOSPC; return 1; }
    return 0;
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define MODE_OF(flags) mode_t permissions = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); permissions = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { NEXT(open); MODE_OF(flags); if (WRITES(flags) && faulty(below_at(AT_FDCWD, path), 1)) return -1; return next(path, flags, permissions); }
int open64(const char *path, int flags, ...) { NEXT(open64); MODE_OF(flags); if (WRITES(flags) && faulty(below_at(AT_FDCWD, path), 1)) return -1; return next(path, flags, permissions); }
int openat(int dir, const char *path, int flags, ...) { NEXT(openat); MODE_OF(flags); if (WRITES(flags) && faulty(below_at(dir, path), 1)) return -1; return next(dir, path, flags, permissions); }
int openat64(int dir, const char *path, int flags, ...) { NEXT(openat64); MODE_OF(flags); if (WRITES(flags) && faulty(below_at(dir, path), 1)) return -1; return next(dir, path, flags, permissions); }
ssize_t write(int fd, const void *data, size_t size) { NEXT(write); if (faulty(below_fd(fd), 1)) return -1; return next(fd, data, size); }
ssize_t writev(int fd, const struct iovec *parts, int count) { NEXT(writev); if (faulty(below_fd(fd), 1)) return -1; return next(fd, parts, count); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { NEXT(pwrite); if (faulty(below_fd(fd), 1)) return -1; return next(fd, data, size, place); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) { NEXT(pwrite64); if (faulty(below_fd(fd), 1)) return -1; return next(fd, data, size, place); }
int ftruncate(int fd, off_t size) { NEXT(ftruncate); if (faulty(below_fd(fd), 1)) return -1; return next(fd, size); }
int ftruncate64(int fd, off64_t size) { NEXT(ftruncate64); if (faulty(below_fd(fd), 1)) return -1; return next(fd, size); }
int mkdir(const char *path, mode_t how) { NEXT(mkdir); if (faulty(below_at(AT_FDCWD, path), 1)) return -1; return next(path, how); }
int mkdirat(int dir, const char *path, mode_t how) { NEXT(mkdirat); if (faulty(below_at(dir, path), 1)) return -1; return next(dir, path, how); }
int rename(const char *from, const char *to) { NEXT(rename); if (faulty(below_at(AT_FDCWD, to), 0)) return -1; return next(from, to); }
int renameat(int a, const char *from, int b, const char *to) { NEXT(renameat); if (faulty(below_at(b, to), 0)) return -1; return next(a, from, b, to); }
int unlink(const char *path) { NEXT(unlink); if (faulty(below_at(AT_FDCWD, path), 0)) return -1; return next(path); }
int unlinkat(int dir, const char *path, int flags) { NEXT(unlinkat); if (faulty(below_at(dir, path), 0)) return -1; return next(dir, path, flags); }
int rmdir(const char *path) { NEXT(rmdir); if (faulty(below_at(AT_FDCWD, path), 0)) return -1; return next(path); }
int fsync(int fd) { NEXT(fsync); if (faulty(below_fd(fd), 0)) return -1; return next(fd); }
int fdatasync(int fd) { NEXT(fdatasync); if (faulty(below_fd(fd), 0)) return -1; return next(fd); }
