/* Preloaded into a process, sends it a signal just before a chosen file operation, or lets its clock run backwards.
 *
 * FAULT_OPERATION: mkdir, write, fsync, rename or unlink. FAULT_UNDER: those on paths that contain this text are
 * counted. FAULT_COUNT: at which one, from 1. FAULT_SIGNAL: its number; SIGKILL comes when half of a write is done.
 * FAULT_CLOCK: CLOCK_REALTIME runs backwards, at the pace at which time goes on, from this many seconds ago.
 * Without these variables nothing is changed. Of the calls that Python and libstdc++ make, no others are seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static atomic_int n_seen;

/* Whether the operation on `name` in the folder `at` (a descriptor; without a name, on the descriptor) is the one. */
static int is_chosen(const char *operation, int at, const char *name) {
    const char *under = getenv("FAULT_UNDER"), *chosen = getenv("FAULT_OPERATION"), *count = getenv("FAULT_COUNT");
    char path[2 * PATH_MAX] = "", link[64];
    if (!under || !count || !chosen || strcmp(chosen, operation)) return 0;
    if (!name || (name[0] != '/' && at != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t n = readlink(link, path, PATH_MAX);
        path[n > 0 ? n : 0] = 0;
    }
    if (name) {
        size_t n = strlen(path);
        snprintf(path + n, sizeof path - n, "/%s", name);
    }
    return strstr(path, under) && atomic_fetch_add(&n_seen, 1) + 1 == atoi(count);
}

static int chosen_signal(void) {
    const char *number = getenv("FAULT_SIGNAL");
    return number ? atoi(number) : SIGKILL;
}

static void strike(void) {
    kill(getpid(), chosen_signal());
    while (chosen_signal() == SIGKILL) pause();
}

static void point(const char *operation, int at, const char *name) {
    if (is_chosen(operation, at, name)) strike();
}

int mkdir(const char *path, mode_t mode) {
    point("mkdir", AT_FDCWD, path);
    return REAL(mkdir)(path, mode);
}

ssize_t write(int fd, const void *from, size_t n) {
    if (is_chosen("write", fd, NULL)) {
        if (chosen_signal() == SIGKILL) syscall(SYS_write, fd, from, n / 2);
        strike();
    }
    return syscall(SYS_write, fd, from, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (is_chosen("write", fd, NULL)) {
        if (chosen_signal() == SIGKILL) syscall(SYS_writev, fd, parts, n / 2);
        strike();
    }
    return syscall(SYS_writev, fd, parts, n);
}

int fsync(int fd) {
    point("fsync", fd, NULL);
    return REAL(fsync)(fd);
}

int rename(const char *from, const char *to) {
    point("rename", AT_FDCWD, to);
    return REAL(rename)(from, to);
}

int unlink(const char *path) {
    point("unlink", AT_FDCWD, path);
    return REAL(unlink)(path);
}

int unlinkat(int at, const char *path, int flags) {
    point("unlink", at, path);
    return REAL(unlinkat)(at, path, flags);
}

int rmdir(const char *path) {
    point("unlink", AT_FDCWD, path);
    return REAL(rmdir)(path);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static atomic_long began;
    const char *behind = getenv("FAULT_CLOCK");
    long done = syscall(SYS_clock_gettime, clock, now), first = 0;
    if (done || clock != CLOCK_REALTIME || !behind) return (int)done;
    if (atomic_compare_exchange_strong(&began, &first, (long)now->tv_sec)) first = now->tv_sec;
    now->tv_sec = first - atol(behind) - (now->tv_sec - first);
    now->tv_nsec = 999999999 - now->tv_nsec;
    return 0;
}
