// Signals that ask a rank for a stop, told apart by their sender, which Python's handlers don't learn. torchrun and the
// supervisor mean "end now" by a SIGTERM; anybody else's (a batch system's, that of a machine that is shut down, a person's)
// is handed on to the supervisor, which asks all ranks at once. The words are in runtime/telemetry/stopsignal.py.
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#define API extern "C" __attribute__((visibility("default")))

static pid_t rank, supervisor;
static int supervisor_fd = -1;                           // a pidfd: a number that was given to another process is no danger
static bool data_worker, watched;

// Whether there is a supervisor to hand it to.
static bool hand_on(int number) {
#if defined(__linux__) && defined(SYS_pidfd_send_signal)
  if (supervisor_fd >= 0) {
    pollfd ended = {supervisor_fd, POLLIN, 0};
    if (poll(&ended, 1, 0) > 0) return false;            // a zombie, which takes signals
    if (!syscall(SYS_pidfd_send_signal, supervisor_fd, number, nullptr, 0)) return true;
    if (errno == ESRCH) return false;
  }
#endif
  return !kill(supervisor, number);
}

static void end(int number) {
  signal(number, SIG_DFL);
  kill(getpid(), number);                                // when the handler has returned
}

static void on_signal(int number, siginfo_t* info, void*) {
  const int kept = errno;
  const pid_t sender = info->si_code <= 0 ? info->si_pid : 0, parent = getppid();   // above 0: the kernel itself
  const bool mine = sender && (sender == parent || sender == supervisor || sender == rank || sender == getpid());
  if (number == SIGTERM && mine) {
    if (data_worker && sender == parent) _exit(0);       // torch expects that of a worker that it ends
    end(number);
  } else if (getpid() == rank && !hand_on(number) && !watched) {
    end(number);
  }                                                      // else a helper that the rank forked: the rank decides
  errno = kept;
}

static int hear(int number) {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigemptyset(&action.sa_mask);
  return sigaction(number, &action, nullptr) ? errno : 0;
}

// In a rank: hand `number` on to the supervisor (a pidfd, or -1; and its pid). 0, or an errno.
API int zt_hand_on(int32_t number, int32_t pidfd, int64_t pid) {
#ifdef __linux__
  rank = getpid();
  supervisor = (pid_t)pid;
  supervisor_fd = pidfd;
  return hear(number);
#else
  (void)number; (void)pidfd; (void)pid; (void)hear;
  return ENOSYS;                                         // si_code has other numbers there
#endif
}

// In a DataLoader's worker that a rank has forked: SIGTERM as above again, where torch has set a handler of its own.
API int zt_in_data_worker() {
  data_worker = true;
  return hear(SIGTERM);
}

// Somebody in this rank sees to it that it saves and ends when the supervisor is gone.
API void zt_supervisor_is_watched() { watched = true; }

API int zt_abi() { return 1; }
