// SIGTERM in a rank, told apart by its sender, which Python's handlers don't learn. torchrun and the supervisor mean "end
// now"; anybody else (a batch system, a machine that is shut down, a person) means "save and stop".
#include <errno.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>
#include <stdint.h>
#define API extern "C" __attribute__((visibility("default")))

static pid_t owner, supervisor;
static int told;

static void on_term(int number, siginfo_t* info, void*) {
  const int kept = errno;
  const pid_t sender = info->si_code <= 0 ? info->si_pid : 0;   // above 0: the kernel itself
  if (sender && (sender == getppid() || sender == supervisor || sender == getpid())) {
    signal(number, SIG_DFL);
    kill(getpid(), number);                              // when this handler has returned
  } else if (getpid() == owner) {
    const char one = 1;
    if (write(told, &one, 1) < 0) { }                    // full: it has been said often enough
  }                                                      // else a forked helper: its parent decides
  errno = kept;
}

// A byte is written to `descriptor` for each SIGTERM that asks for a stop; below 0: in a helper, that only its parent ends.
// 0, or an errno.
API int zt_hear_sigterm(int32_t descriptor, int64_t supervisor_pid) {
  owner = descriptor < 0 ? 0 : getpid();
  supervisor = (pid_t)supervisor_pid;
  told = descriptor;
  struct sigaction action = {};
  action.sa_sigaction = on_term;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigemptyset(&action.sa_mask);
  return sigaction(SIGTERM, &action, nullptr) ? errno : 0;
}

API int zt_abi() { return 1; }
